"""What `data_pipelines.clean` is made of: distances in blocks, what they show, the list of what to leave out, the page."""
