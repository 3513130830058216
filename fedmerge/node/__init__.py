"""A node, step by step: it follows a coordinator, trains, makes and delivers its delta, and keeps what it must."""
