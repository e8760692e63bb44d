"""Every shape of recipe, merged by two tools: see recipe_matrix.py."""
