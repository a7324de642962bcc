"""The built-in triplets: scenes and photographs, changed in known ways."""
