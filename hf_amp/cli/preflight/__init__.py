"""`hf-amp preflight`: what precision will do to a model, before it is trained."""
