"""Carbon of a model's life by LLMCarbon: the file that describes it, and its figures."""
