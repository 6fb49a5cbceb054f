"""Documents and questions: folders and files, named collections, fictional worlds."""
