"""The jobs as Ray pipelines. Ray is imported here and nowhere else."""
