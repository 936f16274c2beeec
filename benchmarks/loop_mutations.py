"""Wrong loops, reports, checks of images and baselines, for mutations.py.

They were chosen from the source alone, by someone who had not read tests/. LOOPS: {(file, function):
[(old, new)]}; `old` stands exactly once in the function after its docstring. LOOP_TESTS: {file: tests}.
"""

LOOP_TESTS = {
    "shapes/check.py": "tests/test_shapes.py",
    "noise_ppo.py": "tests/test_loop_noise_ppo.py tests/test_noise_ppo.py",
    "shapes/render.py": "tests/test_shapes.py",
    "graft.py": "tests/test_loop_graft.py tests/test_run.py",
    "inverse_noise_correction.py": "tests/test_loop_correction.py tests/test_inverse_noise_correction.py",
    "pgraft.py": "tests/test_loop_pgraft.py tests/test_pgraft.py",
    "benchmarks/ddpo.py": "tests/test_loop_ddpo.py tests/test_ddpo.py",
    "molecules/graft_molecules.py": "tests/test_loop_molecules.py",
}
LOOPS = {
    ("molecules/graft_molecules.py", "main"): [
        ("derived_seed(args.seed, r, i, j)", "derived_seed(args.seed, 0, i, j)"),
        ('if args.reference == "base" else', 'if args.reference != "base" else'),
        ('if args.rule != "none":', 'if args.rule == "none":'),
        ('{key for accepted in state["accepted"] for key in accepted["keys"]}', "set()"),
        ('x_0[index], "count"', 'x_0[: len(index)], "count"'),
        ('else state["accepted"][-1:]', 'else state["accepted"]'),
        ("args.lr * (1 - update / args.updates)", "args.lr"),
        ("torch.randn(x_0.shape, generator=generator)", "torch.zeros(x_0.shape)"),
        ('state["losses"] += losses', 'state["losses"] = losses'),
        ('range(state["round"], args.rounds)', "range(args.rounds)"),
        ("loss * count[part].sum() / count.sum()", "loss * count[part].sum()"),
        ('"molecules_trained_on": len(data)', '"molecules_trained_on": len(losses)'),
    ],
    ("molecules/graft_molecules.py", "sample_and_judge"): [
        ('0.0 if args.reward == "stable" else -math.inf', "0.0"),
        ("if j.stable else lowest", "if j.valid else lowest"),
    ],
    ("molecules/graft_molecules.py", "evaluate"): [
        ('derived_seed("eval", i)', 'derived_seed("eval", 0)'),
        ("i // GRID_COLUMNS % len(args.atoms)", "i % len(args.atoms)"),
        ("not in known", "in known"),
    ],
    ("molecules/graft_molecules.py", "sampled_row"): [
        ("rewards.flatten()[index]", "rewards.flatten()[ruled]"),
        ("if s}) / len(keys)", "}) / len(keys)"),
    ],
    ("graft.py", "main"): [
        ("derived_seed(args.seed, r, i, j)", "derived_seed(args.seed, 0, i, j)"),
        ("derived_seed(args.seed, r, i, j)", 'derived_seed("eval", i, j)'),
        (".repeat_interleave(args.samples)", ".repeat(args.samples)"),
        (
            'if args.reference == "base" else model.lora_merged()',
            'if args.reference != "base" else model.lora_merged()',
        ),
        ("args.lora_alpha, args.lora_targets, args.seed)", "args.lora_alpha, args.lora_targets, 0)"),
        ("scores[args.reward].view(-1, args.samples)", "scores[args.reward].view(args.samples, -1).T"),
        ('"reward_max": args.reward_max}', '"reward_max": None}'),
        ('{"latents": latents[index]', '{"latents": latents[: len(index)]'),
        ('"sample": index % args.samples', '"sample": index // args.samples'),
        (
            "save_accepted(folder, model, latents[index],",
            "save_accepted(folder, model, latents[: len(index)],",
        ),
        ('state["accepted"] if args.accumulate else state["accepted"][-1:]', 'state["accepted"]'),
        ('else state["accepted"][-1:]', 'else state["accepted"][:1]'),
        ('derived_seed(args.seed, "update", r)', 'derived_seed(args.seed, "update", 0)'),
        (
            "[torch.randperm(len(data), generator=generator) for _ in range(epochs)]",
            "[torch.randint(len(data), (len(data),), generator=generator) for _ in range(epochs)]",
        ),
        ("torch.randn(x_0.shape, generator=generator)", "torch.zeros(x_0.shape)"),
        (
            "model.draw_timesteps(args.batch, generator)",
            "model.draw_timesteps(1, generator).repeat(args.batch)",
        ),
        ('["" if d else prompts[i] for d, i', "[prompts[i] for d, i"),
        ("args.guidance if args.guided_loss else 1", "args.guidance"),
        ("t[part], noise[part], guidance", "t[part], noise[: len(part)], guidance"),
        ("losses[-1] += loss.item() * len(part) / args.batch", "losses[-1] = loss.item()"),
        ("clip_grad_norm_(parameters, 1.0)", "clip_grad_norm_(parameters[-1:], 1.0)"),
        ("lr=args.lr, weight_decay=0.0", "lr=args.lr"),
        (
            'evaluate(model, rewards, held_out, args, "evaluate base")',
            'evaluate(model, rewards, prompts[: len(held_out)], args, "evaluate base")',
        ),
        ("(r + 1) % args.eval_every == 0", "r % args.eval_every == 0"),
        ('"images_trained_on": len(data)', '"images_trained_on": len(kept[-1]["prompt"])'),
        (
            'row["reward_held_out"] = state["tuned"][args.reward]',
            'row["reward_held_out"] = base[args.reward]',
        ),
        ('state["losses"] += losses', 'state["losses"] = losses'),
        ('range(state["round"], args.rounds)', "range(args.rounds)"),
    ],
    ("graft.py", "sample_and_score"): [
        ("draw_noise(seeds[batch],", "draw_noise(seeds[: len(seeds[batch])],"),
        ("latents.append(x_0.cpu())", "latents.append(noise[0].cpu())"),
        ("args.guidance, args.eta)", "1, args.eta)"),
        ("model.decode(x_0, label)", "model.decode(noise[-1].to(x_0), label)"),
    ],
    ("graft.py", "evaluate"): [
        ('derived_seed("eval", i, j)', 'derived_seed("eval", 0, j)'),
        ("values.view(-1, n).mean(1)", "values.view(n, -1).mean(0)"),
        ("images[i * n : i * n + n]", "images[i :: len(prompts)]"),
    ],
    ("graft.py", "sampled_row"): [
        ("rewards.flatten()[index].mean()", "rewards.flatten()[: len(index)].mean()"),
        ("estimated_kl(rewards, args.rule, **options)", 'estimated_kl(rewards, "topk", **options)'),
        ("name: values.mean().item()", "name: values[index].mean().item()"),
        ("len(index) / rewards.numel()", "len(index) / rewards.shape[0] / (rewards.shape[1] - 1)"),
    ],
    ("graft.py", "print_round"): [
        ('* (rounds - state["round"])', "* rounds"),
    ],
    ("pgraft.py", "sample"): [
        ("with model.lora_off():", "with model.lora_merged() if tuned else model.lora_off():"),
    ],
    ("pgraft.py", "sample_and_score"): [
        ("(x_s.cpu(), x_0.cpu())", "(x_0.cpu(), x_s.cpu())"),
        ("model.decode(x_0, label)", "model.decode(x_s, label)"),
        ("args.eta, switch_at, tuned", "args.eta, switch_at"),
        ("args.eta, switch_at, tuned", "args.eta, args.steps - switch_at, tuned"),
        ("draw_noise(seeds[batch],", "draw_noise(seeds[: len(seeds[batch])],"),
    ],
    ("pgraft.py", "probe"): [
        ("derived_seed(seed, step, j)", "derived_seed(seed, 0, j)"),
        ('derived_seed(args.seed, "probe", i, j)', 'derived_seed("eval", i, j)'),
        ("draw_noise(restart_seeds,", "draw_noise(seeds[batch],"),
        ("            before = step", "            before = 0"),
        ("values.permute(1, 2, 0)", "values.permute(1, 0, 2)"),
        ('"switch": levels[step] / model.train_timesteps', '"switch": step / args.steps'),
    ],
    ("pgraft.py", "evaluate"): [
        ("args, switch_at, tuned, label)", "args, args.steps, tuned, label)"),
        ("values.view(-1, n).mean(1)", "values.view(n, -1).mean(0)"),
    ],
    ("pgraft.py", "show_probe"): [
        ("--switch {switch:.9g}, {reason}", "--switch {levels[0]:.9g}, {reason}"),
    ],
    ("pgraft.py", "save_switch"): [
        ('"switch": timestep / model.train_timesteps', '"switch": timestep'),
    ],
    ("pgraft.py", "main"): [
        (
            "chosen = [prompts[i] for i in order[: args.probe_prompts]]",
            "chosen = held_out[: args.probe_prompts]",
        ),
        ("switch_at = switch_step(grid, switch)", "switch_at = max(1, switch_step(grid, switch) - 1)"),
        ('tuned = args.reference == "newest" and (r > 0', "tuned = (r > 0"),
        ("derived_seed(args.seed, r, i, j)", "derived_seed(args.seed, 0, i, j)"),
        ("index = mask.flatten()", "index = mask.T.flatten()"),
        ('{"x_s": x_s[index]', '{"x_s": x_0[index]'),
        ("save_accepted(folder, model, x_0[index]", "save_accepted(folder, model, x_s[index]"),
    ],
    ("noise_ppo.py", "NoisePolicy.__init__"): [
        ("not std_only", "not mean_only"),
    ],
    ("noise_ppo.py", "NoisePolicy.standardise"): [
        ("self.centre.copy_(text.float().mean(0))", "self.centre.copy_(text.float().mean((0, 1)))"),
    ],
    ("noise_ppo.py", "NoisePolicy.forward"): [
        (" * self.conditional", ""),
    ],
    ("noise_ppo.py", "NoisePolicy.sample"): [
        ("mean + log_std.exp() * eps", "mean + log_std * eps"),
    ],
    ("noise_ppo.py", "sample_and_score"): [
        ("model, z[batch], model.encode", "model, z[: len(prompts[batch])], model.encode"),
        (
            "score(rewards, batch_images, prompts[batch])",
            "score(rewards, batch_images, prompts[: len(batch_images)])",
        ),
    ],
    ("noise_ppo.py", "evaluate"): [
        ("derived_seed(tag, i, j)", "derived_seed(tag, args.seed, i, j)"),
        ("eps).flatten(0, 1)", "eps).transpose(0, 1).flatten(0, 1)"),
        ("view(-1, n // m, m)", "view(-1, m, n // m)"),
        ("images[i * n : i * n + n]", "images[i : i + n]"),
    ],
    ("noise_ppo.py", "final_evaluation"): [
        ('noises["learnt"]).mean().item()', 'noises["learnt"]).sum().item()'),
        ('*options, tag="temperature")', "*options)"),
        (
            'if steps == args.steps:\n            results["table"] = table',
            'if steps == all_steps[-1]:\n            results["table"] = table',
        ),
        ("held_out, mean, log_std, steps, args, label)", "held_out, mean, log_std, args.steps, args, label)"),
        ("held_out, mean, log_std, steps, args, label)", "held_out, mean, 0 * log_std, steps, args, label)"),
    ],
    ("noise_ppo.py", "steps_row"): [
        ('metrics["standard"].items() if name.startswith', 'metrics["learnt"].items() if name.startswith'),
        (
            'metrics["learnt"]["diversity"].mean() / metrics["standard"]',
            'metrics["standard"]["diversity"].mean() / metrics["learnt"]',
        ),
    ],
    ("noise_ppo.py", "show_steps"): [
        ("± {gain[1][i]:.3f}", "± {gain[1][0]:.3f}"),
    ],
    ("noise_ppo.py", "main"): [
        (
            "policy.standardise(text_features(model, used))",
            "policy.standardise(text_features(model, [*used, *held_out]))",
        ),
        ("torch.manual_seed(args.seed)", "torch.manual_seed(0)"),
        ('policy.load_state_dict(state["policy"])', "pass"),
        ('range(state["iteration"], args.iterations)', "range(args.iterations)"),
        ("torch.tensor(schedule[it])", "torch.tensor(schedule[0])"),
        ("derived_seed(args.seed, it, i, j)", "derived_seed(args.seed, 0, i, j)"),
        (
            "features = text_features(model, image_prompts)",
            "features = text_features(model, image_prompts[::-1])",
        ),
        ("rewards[:1], image_prompts, z, args.steps", "rewards[:1], image_prompts, z, max(all_steps), args"),
        (
            "advantages(reward, ids, args.normalise)",
            "advantages(reward, torch.arange(len(ids)) % args.samples, args.normalise)",
        ),
        ('derived_seed(args.seed, "update", it)', 'derived_seed(args.seed, "update", 0)'),
        (
            "[torch.randperm(len(z), generator=generator) for _ in range(args.epochs)]",
            "[torch.randperm(len(z), generator=generator)] * args.epochs",
        ),
        ("policy(features[index])", "policy(features[: len(index)])"),
        ("ppo_loss(new, old[index], advantage[index]", "ppo_loss(new, old[index], advantage[: len(index)]"),
        (
            "kl_to_standard_normal(mean, log_std).mean() / dimensions",
            "kl_to_standard_normal(old_mean, old_log_std).mean() / dimensions",
        ),
        (".exp() - 1).abs() > args.clip", ".exp() - 1) > args.clip"),
        ('"reward": reward.mean().item()', '"reward": reward.view(-1, args.samples).amax(1).mean().item()'),
        ('log_ratio = log_prob(z, mean, log_std, "sum")', 'log_ratio = log_prob(z, mean, log_std, "mean")'),
        (
            "held_out, mean, log_std, args.steps, args, label)",
            "held_out, zero, zero, args.steps, args, label)",
        ),
        ('"steps": args.steps,', '"steps": max(all_steps),'),
    ],
    ("inverse_noise_correction.py", "fit"): [
        ('optimizer.load_state_dict(state["optimizer"])', "pass"),
        ('average = [p.to(parameters[0].device) for p in state["average"]]', "pass"),
        ('state["weights"] = weights', 'state["weights"] = copy.deepcopy(network.state_dict())'),
        ("lr * warm_up * cosine", "lr * warm_up"),
        ("torch._foreach_copy_([p.data for p in parameters], average)", "pass"),
        ("if (i + 1) % every == 0 or i + 1 == updates:", "if i % every == 0 or i + 1 == updates:"),
        ("lr=lr, weight_decay=0.0", "lr=lr"),
    ],
    ("inverse_noise_correction.py", "flow_objective"): [
        ("torch.randn(x.shape, generator=generator)", "torch.zeros(x.shape)"),
    ],
    ("inverse_noise_correction.py", "train_corrector"): [
        (
            "corrector.standardise(held_out), corrector.standardise(noises)",
            "corrector.standardise(held_out), corrector.standardise(torch.cat([noises, held_out]))",
        ),
        (
            "corrector.standardise(held_out), corrector.standardise(noises)",
            "corrector.standardise(noises), corrector.standardise(noises)",
        ),
        ("corrector.standardise(held_out), corrector.standardise(noises)", "held_out, noises"),
        ("torch.rand(len(w), generator=generator)", "torch.rand(1, generator=generator).expand(len(w))"),
        ("state.update(best=value, final=", "state.update(final="),
        ('key = (args.seed, "corrector")', 'key = (0, "corrector")'),
    ],
    ("inverse_noise_correction.py", "invert_images"): [
        ("x = images[i : i + args.sample_batch]", "x = images[: args.sample_batch]"),
        ('failed += batch["counts"][0]', 'failed = batch["counts"][0]'),
    ],
    ("inverse_noise_correction.py", "inversion_report"): [
        ("contraction.nanmean(0)", "contraction.nanmean(1)"),
        ('"iterations": iterations.mean(0)', '"iterations": iterations[-1]'),
    ],
    ("inverse_noise_correction.py", "evaluate"): [
        ("draw_noise(seeds[i : i + args.sample_batch],", "draw_noise(seeds[: args.sample_batch],"),
        ("seconds / len(images)", "seconds"),
    ],
    ("inverse_noise_correction.py", "add_data_noise"): [
        ('derived_seed("data noise", name)', 'derived_seed("data noise")'),
    ],
    ("shapes/check.py", "_components"): [
        ("(r, c - 1)):", "(r, c - 1), (r + 1, c + 1), (r - 1, c - 1)):"),
    ],
    ("shapes/check.py", "find_objects"): [
        ("np.median(pixels.reshape(-1, 3), 0)", "pixels[0, 0]"),
        ("len(p) >= SPECK", "len(p) > 4 * SPECK"),
        ("reverse=True", "reverse=False"),
        ("median - _VALUES, axis=-1).argmin()", "median - _VALUES, axis=-1).argmax()"),
        ("<= COLOUR_TOLERANCE and alike", "<= COLOUR_TOLERANCE or alike"),
        ("_NAMES[index] if pure else None", "_NAMES[index]"),
        ("best if overlap[best] >= FIT else None", "best"),
        ("cy - CENTROID[shape] * radius", "cy + CENTROID[shape] * radius"),
        ("float(cx),\n                float(cy),", "float(cy),\n                float(cx),"),
        ("(direction @ direction), 0, 1) * near", "(direction @ direction), 0, 1)"),
        ("(share * _X).sum() / area", "(mask * _X).sum() / area"),
    ],
    ("shapes/check.py", "check"): [
        ("dx, dy = a.x - b.x, a.y - b.y", "dx, dy = b.x - a.x, b.y - a.y"),
        ("if RELATIONS[relation][0] else", "if RELATIONS[relation][1] else"),
        ("along * sum(RELATIONS[relation]) > abs(across)", "along * sum(RELATIONS[relation]) > 0"),
        ("along * sum(RELATIONS[relation]) > abs(across)", "abs(along) > abs(across)"),
        ("if i != j:", "if True:"),
        ("(b.colour == second[0])", "(b.colour == first[0])"),
        ("(b.shape == second[1])", "(b.shape == first[1])"),
        ("(a.colour == second[0]) + (a.shape == second[1])", "0"),
        ("best = max(best, int(points + right))", "best = int(points + right)"),
        ("int(points + right)", "int(points) + 1"),
        ("best += len(found) == 2", "best += len(found) >= 2"),
        ("Check(best == 6,", "Check(best >= 5,"),
        ("best / 6,", "best / 5,"),
        ("np.mean([o.fit for o in found])", "np.max([o.fit for o in found])"),
    ],
    ("shapes/render.py", "parse"): [
        ("return objects[0], relation, objects[1]", "return objects[1], relation, objects[0]"),
        ("o[0] in COLOURS and o[1] in SHAPES", "o[0] in COLOURS or o[1] in SHAPES"),
    ],
    ("shapes/render.py", "half_extent"): [
        ("return width * radius, height * radius", "return height * radius, width * radius"),
    ],
    ("shapes/render.py", "inside"): [
        ("y >= 3**0.5 * abs(x) - half_height", "y >= abs(x) - half_height"),
        ("<= 0.886 * radius", "<= radius"),
    ],
    ("shapes/render.py", "coverage"): [
        ("(np.arange(SIZE * samples) + 0.5) / samples", "np.arange(SIZE * samples) / samples"),
        ("grid[None, :] - cx, grid[:, None] - cy", "grid[:, None] - cx, grid[None, :] - cy"),
    ],
    ("shapes/render.py", "render"): [
        ("(0, 1) if sign < 0 else (1, 0)", "(0, 1) if sign > 0 else (1, 0)"),
        ("reach = 0.5 * distance", "reach = 2 * distance"),
        ("extents[:, axis].sum() + GAP", "extents[:, axis].sum() - GAP"),
    ],
    ("shapes/render.py", "write_prompts"): [
        ("min((a, r, b), (b, REVERSED[r], a))", "(a, r, b)"),
        ("order[eval_pairs:]", "order"),
    ],
    ("benchmarks/ddpo.py", "main"): [
        ("score(rewards[:1], images, batch_prompts)", "score(rewards[:1], images, batch_prompts[::-1])"),
    ],
}
