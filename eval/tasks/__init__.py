"""Tasks on which methods are judged; each file makes prompts and says when an answer is right."""
