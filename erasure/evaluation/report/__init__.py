"""Reports: figures and notes as plain data, and what writes them as JSON, HTML and PNG."""
