"""What a training run does: settings, optimizer, schedule, automatic choices, evaluation, the report."""
