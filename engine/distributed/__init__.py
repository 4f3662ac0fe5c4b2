"""The processes of a job: what they tell each other, how they are started, where one of them hangs."""
