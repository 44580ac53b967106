"""Models: any timm ViT or DeiT from a spec, and where its weights come from."""
