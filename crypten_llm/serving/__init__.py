"""The endpoint at the client: HTTP before one session, in OpenAI's interface; the command ``serve`` imports it."""
