"""Documents and questions: folders and files, named collections, fictional worlds."""

from cas.data import named as named  # registers the names that Collection.load generates
