"""`recipe: sft` and `recipe: preference`: one policy, trained and evaluated by the method's own stages."""
