"""`recipe: sft`, `preference` and `reward`: one model, trained and evaluated by the method's own stages."""
