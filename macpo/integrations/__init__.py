"""Drop-ins for other trainers: `trl.FusedDPOTrainer` and `transformers.PreferenceTrainer`. See docs/drop-in.md."""
