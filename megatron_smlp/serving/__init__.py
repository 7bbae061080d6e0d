"""A checkpoint behind an HTTP server with OpenAI's completions."""
