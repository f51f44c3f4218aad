"""What runs where the near tier lives: plain tensor code, no knowledge of policies."""
