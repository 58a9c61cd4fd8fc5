"""The page on which a decision is made."""
