"""What people use: a loaded model, documents, conversations, answers, and the memory plan."""
