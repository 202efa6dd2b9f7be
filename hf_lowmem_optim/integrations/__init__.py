"""What front ends load of this package by name; each file imports the front end that it is for."""
