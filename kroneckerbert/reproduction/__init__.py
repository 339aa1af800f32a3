"""The paper's procedure as a recipe: its stages, its tasks and its model card."""
