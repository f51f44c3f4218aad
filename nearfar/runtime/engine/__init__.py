"""The interface for users: a loaded model, documents, conversations, answers, the memory plan."""
