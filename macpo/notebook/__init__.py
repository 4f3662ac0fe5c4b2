"""What `import macpo` offers a notebook besides policies: a run as a function, and its folder as DataFrames."""
