"""Where hf_amp meets accelerate and transformers; nothing else imports them."""
