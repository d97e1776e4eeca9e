"""What changes logits before they are normalised: by what was fixed beforehand, or is paid already."""
