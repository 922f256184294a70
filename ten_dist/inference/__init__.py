"""Using a trained model on text: many prompts at once, and conversations."""
