"""HTTP protocols over one engine, OpenAI's, Anthropic's and MiniMax's, and a page that shows where the model looks."""
