"""AdamW of fastlm_kernels in a plain PyTorch loop: the import is all that changes.

    python examples/adamw_plain_loop.py

On a GPU the whole update, clipping and zeroing of the gradients included, is three launches; on a CPU it is torch's.
"""

import torch

import fastlm_kernels as fk


def main(steps: int = 200) -> list[float]:
    """Fit a small network to a sine; the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(device)
    optimizer = fk.optim.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0, skip_nonfinite=True, zero_grads=True)
    x = torch.linspace(-3, 3, 256, device=device)[:, None]
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(model(x), x.sin())
        loss.backward()
        optimizer.step()  # clips, leaves out a step with a NaN in it, and zeroes the gradients
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")  # noqa: T201
