"""An HTTP server that answers OpenAI's completions API from a checkpoint."""
