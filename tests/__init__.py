"""The tests: a folder for each package, with what they share in `helpers`."""
