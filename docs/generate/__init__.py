"""What the pages of docs/ say that the code says already: generated from it, never written.

Every generator returns the whole text of its page as it should be.
"""
