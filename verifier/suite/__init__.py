"""The ablation suite: experiments as signed prover sessions, their replays, and files that can be published."""
