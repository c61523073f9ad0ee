"""The tests, a module for each group; to be read as the contract by example."""
