"""Nodes for ComfyUI: patches with their gates, closed forms and judges in a graph (docs/comfyui.md).

ComfyUI finds the two tables below in a folder of `custom_nodes`. The folder may be a link to this one, or what
`python -m erasure.comfyui` writes. ComfyUI itself is imported only while its nodes run.
"""

from erasure.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
