"""Workers that step apart on their own data, and average every so many steps."""
