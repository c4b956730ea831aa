"""What an agent experiences: rollouts, replay, running statistics of observations, greedy play of many agents."""
