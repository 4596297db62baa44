"""Links between the parties: how they meet, what they send, and what it is counted in."""
