"""The page of Erasure in a Hugging Face Space: glyph on a free CPU, for anybody."""

import os

from erasure.app.server import serve_public

serve_public(port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
