"""Starting the ranks of a run on one machine or many, and starting them again."""
