"""Reports of evaluations: results and notes as plain data, and the code that writes them as JSON, HTML and PNG."""
