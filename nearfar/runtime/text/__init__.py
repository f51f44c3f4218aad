"""Text in and text out: documents, tokenizers, chat templates, thoughts."""
