"""`erasure app`: a page in the browser on which concepts are erased, looked at, measured and attacked.

`jobs`, `models`, `visits` and `tasks` know nothing of the page and need no Gradio; `page`, `events` and `server` do.
"""
