"""One job in several processes, on one machine or on many: who is in it, what they exchange, and how it ends."""
