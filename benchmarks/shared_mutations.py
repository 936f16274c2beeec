"""Wrong shared modules, rewards, evaluations and reports, for mutations.py.

They were chosen from the source alone, before tests/ was read; the tests beside them were found or written
afterwards. SHARED: {(file, function, test file and -k): [(old, new)]}.
"""

SHARED = {
    ("common.py", "with_family_defaults", "tests/test_bad_input.py -k test_found_before_the_model_loads"): [
        ("is None}", "is not None}"),
    ],
    ("common.py", "is_checkpoint", "tests/test_reward_models.py -k test_no_checkpoint"): [
        ('name.count("/") == 1', 'name.count("/") >= 1'),
    ],
    (
        "common.py",
        "config_source",
        "tests/test_model_folders.py -k test_single_files_without_configuration",
    ): [
        ('if kind not in ("v1", "xl_base"):', 'if kind not in ("v1", "v2", "xl_base"):'),
        ('if "inpaint" in kind:', 'if kind == "inpaint":'),
    ],
    ("common.py", "weight_shapes", "tests/test_model_folders.py -k test_single_file"): [
        ('state.get("state_dict", state)', "state"),
    ],
    (
        "common.py",
        "check_model",
        "tests/test_model_folders.py -k test_networks_that_are_sampled_in_another_way",
    ): [
        ("if problem := family.problem(network):", "if False:"),
    ],
    ("common.py", "family_default", "tests/test_families.py -k test_own_defaults_of_a_script"): [
        ("values[1 + family.flow]", "values[1]"),
    ],
    (
        "common.py",
        "with_family_defaults",
        "tests/test_model_folders.py -k test_sizes_that_the_model_cannot_take",
    ): [
        ("if pixels and pixels % family.multiple:", "if pixels and pixels % 8:"),
    ],
    (
        "common.py",
        "StableDiffusion3.scheduler",
        "tests/test_model_folders.py -k test_a_flow_whose_levels_rise",
    ): [
        ("if config.invert_sigmas:", "if False:"),
    ],
    (
        "common.py",
        "StableDiffusion.latent_shape",
        "tests/test_model_folders.py -k test_one_of_height_and_width",
    ): [
        ("height // scale, width // scale", "width // scale, height // scale"),
    ],
    (
        "common.py",
        "StableDiffusion3.scheduler",
        "tests/test_families.py -k test_scheduler_of_another_kind_is_refused",
    ): [
        ("config.use_dynamic_shifting > self.dynamic", "False"),
    ],
    ("common.py", "Flux.mu", "tests/test_families.py -k test_noise_policy_with_the_stock_pipeline"): [
        ('"base_shift", "max_shift")', '"max_shift", "base_shift")'),
    ],
    ("common.py", "Flux.predict", "tests/test_families.py -k test_denoising_loss"): [
        ("/ 1000", "/ 999"),
        ("guidance, device", "1.0, device"),
    ],
    ("common.py", "Model.warn_of_cut", "tests/test_inputs.py -k test_the_encoder_that_reads_most_counts"): [
        ('self.family.call.get("max_sequence_length", default)', "default"),
        ("len(ids) > limit", "len(ids) >= limit"),
    ],
    ("common.py", "Model.load_lora", "tests/test_start_lora.py -k test_what_is_refused"): [
        ('("lora_te", "text_encoder")', '("lora_te",)'),
        ("if not len(fit) == len(names) == len(self.lora()):", "if not len(fit) == len(self.lora()):"),
    ],
    ("common.py", "find_lora", "tests/test_start_lora.py -k test_bad_settings"): [
        ("if len(files) != 1:", "if not files:"),
    ],
    (
        "common.py",
        "Flux.set_timesteps",
        "tests/test_families.py -k test_noise_policy_with_the_stock_pipeline",
    ): [
        ("np.linspace(1.0, 1 / steps, steps)", "np.linspace(1.0, 0.0, steps)"),
    ],
    ("common.py", "Model.lora_off", "tests/test_model_folders.py -k test_run_on_a_single_file"): [
        ("self.denoiser.enable_adapters()", "pass"),
    ],
    ("common.py", "read_switch", "tests/test_bad_input.py -k test_bad_results_of_pgraft"): [
        ("< 1e-3:", "< 1e3:"),
        ("if not math.isfinite(timestep):", "if False:"),
        ("0 <= timestep < model.train_timesteps", "True"),
    ],
    ("common.py", "stock_switch", "tests/test_noise_ppo.py -k test_run_on_top_of_a_tuned_model"): [
        ("pipe.scheduler.timesteps > {level}", "pipe.scheduler.timesteps >= {level}"),
    ],
    (
        "common.py",
        "schedule_prompts",
        "tests/test_equations.py -k test_schedule_uses_every_prompt_before_any_again",
    ): [
        ("min(per_round, count)", "per_round"),
    ],
    ("common.py", "with_family_defaults", "tests/test_families.py -k test_defaults_of_the_embedded_model"): [
        ("defaults = EMBEDDED_DEFAULTS if embedded else family.defaults", "defaults = family.defaults"),
    ],
    ("common.py", "is_checkpoint", "tests/test_model_folders.py -k test_a_file_is_no_hub_id"): [
        ("hub_id and not Path(name).exists()", "hub_id"),
    ],
    ("common.py", "StableDiffusion.size", "tests/test_model_folders.py -k test_size_of_the_configuration"): [
        (
            "height, width = (size, size) if isinstance(size, int) else size",
            "height = width = size if isinstance(size, int) else size[0]",
        ),
    ],
    ("common.py", "load_model", "tests/test_model_folders.py -k test_no_t5"): [
        ("args.t5, *size", "True, *size"),
    ],
    ("common.py", "check_device", "tests/test_inputs.py -k test_devices"): [
        ('if device != "cuda" and dtype', 'if device == "cpu" and dtype'),
    ],
    ("common.py", "config_source", "tests/test_model_folders.py -k test_bad_single_files"): [
        ("if config and not is_checkpoint(config):", "if False:"),
    ],
    ("common.py", "check_model", "tests/test_model_folders.py -k test_bad_single_files"): [
        ("if source != name and family.flow:", "if family.flow and False:"),
    ],
    (
        "common.py",
        "StableDiffusion.problem",
        "tests/test_model_folders.py -k test_networks_that_are_sampled_in_another_way",
    ): [
        ("if inputs != outputs:", "if inputs > 9:"),
    ],
    ("common.py", "with_family_defaults", "tests/test_families.py -k test_own_defaults_of_a_script"): [
        ("values[0] if embedded else", "values[1] if embedded else"),
    ],
    ("common.py", "StableDiffusion.to_vae", "tests/test_families.py -k test_sample_equals_stock_pipeline"): [
        ("+ (config.shift_factor or 0)", "- (config.shift_factor or 0)"),
    ],
    (
        "common.py",
        "StableDiffusion.scheduler",
        "tests/test_families.py -k test_scheduler_of_another_kind_is_refused",
    ): [
        ('("epsilon", "v_prediction")', '("epsilon", "v_prediction", "sample")'),
    ],
    ("common.py", "StableDiffusionXL.prepare", "tests/test_model_folders.py -k test_height_and_width"): [
        ("(size, (0, 0), size,", "(size, (0, 0), (m.width, m.height),"),
    ],
    (
        "common.py",
        "StableDiffusion3.prepare",
        "tests/test_model_folders.py -k test_sizes_that_the_model_cannot_take",
    ): [
        ("if getattr(m, side) > most:", "if m.height > most:"),
    ],
    ("common.py", "Flux.shift", "tests/test_families.py -k test_grid_and_calls_of_the_stock_pipeline"): [
        ("return half / (1 - half)", "return half"),
    ],
    ("common.py", "Flux2KleinBase.to_vae", "tests/test_families.py -k test_sample_equals_stock_pipeline"): [
        ("variance + epsilon", "variance"),
    ],
    ("common.py", "Model.lora_merged", "tests/test_model_folders.py -k test_run_on_a_single_file"): [
        ("layer.merged_adapters.clear()", "pass"),
    ],
    ("common.py", "Model.lora_merged", "tests/test_diffusion_nft.py -k test_run_and_resume"): [
        ("layer.get_base_layer().weight.data.copy_(weight)", "pass"),
    ],
    (
        "common.py",
        "find_lora",
        "tests/test_start_lora.py -k test_the_file_of_a_run_is_taken_whatever_lies_beside_it",
    ): [
        ("if path / LORA_FILE in files else files", "if False else files"),
    ],
    ("common.py", "check_flow", "tests/test_bad_input.py -k test_bad_flows"): [
        ('or network.get("num_class_embeds")', ""),
        (
            '"use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"',
            '"use_dynamic_shifting", "invert_sigmas"',
        ),
    ],
    ("common.py", "check_guidance", "tests/test_families.py -k test_what_a_distilled_model_cannot_take"): [
        ("not in (None, 1)", "not in (None,)"),
    ],
    (
        "common.py",
        "StableDiffusion.scheduler",
        "tests/test_families.py -k test_settings_of_a_scheduler_that_are_turned_off",
    ): [
        ("clip_sample=False, thresholding=False", "clip_sample=False"),
    ],
    (
        "common.py",
        "StableDiffusion3.scheduler",
        "tests/test_families.py -k test_settings_of_a_scheduler_that_are_turned_off",
    ): [
        ("stochastic_sampling=False", "stochastic_sampling=True"),
    ],
    ("common.py", "load_pipeline", "tests/test_model_folders.py -k test_only_fp16_files"): [
        ('"fp16" if "fp16" in variants else None', "None"),
    ],
    ("common.py", "load_part", "tests/test_model_folders.py -k test_only_fp16_files"): [
        ('for variant in ("fp16",) if only_half else (None, "fp16"):', 'for variant in (None, "fp16"):'),
    ],
    ("common.py", "Model.__init__", "tests/test_model_folders.py -k test_a_missing_weight_is_named"): [
        ("self.left_out = {} if t5", "self.left_out = {} if not t5"),
    ],
    (
        "common.py",
        "Model.remember",
        "tests/test_families.py -k test_text_encoders_are_on_the_device_only_while_they_encode",
    ): [
        ('encoder.to("cpu")', "pass"),
        ("if p not in self.text_cache]", "]"),
    ],
    ("common.py", "Model.decode", "tests/test_families.py -k test_one_pixel_that_is_no_number"): [
        ("if not pixels.isfinite().all():", "if pixels.isnan().all():"),
    ],
    (
        "common.py",
        "Model.alpha_sigma",
        "tests/test_families.py -k test_level_after_the_last_step_of_a_flow",
    ): [
        ("at.clamp(min=0)", "at"),
    ],
    ("common.py", "Model.add_lora", "tests/test_pipeline.py -k test_lora_seed"): [
        ("torch.manual_seed(seed)", "torch.manual_seed(0)"),
    ],
    ("common.py", "load_single_file", "tests/test_model_folders.py -k test_single_file"): [
        ("return pipeline.to(dtype)", "return pipeline"),
    ],
    ("common.py", "Model.__init__", "tests/test_model_folders.py -k test_one_of_height_and_width"): [
        ("self.height, self.width = height or self.height, width or self.width", "pass"),
    ],
    ("common.py", "Model.remember", "tests/test_pipeline.py -k test_many_prompts_are_encoded_as_one_is"): [
        ("i : i + 64", "i : i + 63"),
    ],
    ("common.py", "Model.timesteps", "tests/test_families.py -k test_grid_and_calls_of_the_stock_pipeline"): [
        ("self.shift = self.family.shift(self, steps)", "pass"),
    ],
    ("common.py", "Model.draw_timesteps", "tests/test_families.py -k test_flow_timesteps_to_train_on"): [
        ("int(above) + 1", "int(above)"),
        ("max(above, 0)", "0"),
    ],
    ("common.py", "check_start", "tests/test_start_lora.py -k test_a_stored_run_has_its_rank"): [
        ("and not args.resume:", "and True:"),
    ],
    ("common.py", "stock_call", "tests/test_families.py -k test_what_the_stock_call_cannot_make"): [
        ('if args.eta else ""', 'if True else ""'),
    ],
    (
        "common.py",
        "Flow.grid",
        "tests/test_inverse_noise_correction.py -k test_levels_that_do_not_fall_from_1_to_0",
    ): [
        ("(grid.diff() >= 0).any()", "False"),
    ],
    ("common.py", "check_finite", "tests/test_families.py -k test_gradients_that_stay_infinite"): [
        ("scaler.get_scale() > 1", "True"),
    ],
    ("common.py", "find_family", "tests/test_families.py -k test_sample_equals_stock_pipeline"): [
        ("bool(read(file).get(setting)) == value", "True"),
    ],
    ("common.py", "load_pipeline", "tests/test_families.py -k test_no_t5"): [
        ("if part in left_out or", "if"),
    ],
    ("common.py", "refuse_missing", "tests/test_model_folders.py -k test_weights_with_other_names"): [
        ("len(weights) - 3", "len(weights)"),
    ],
    (
        "common.py",
        "Model.__init__",
        "tests/test_families.py -k test_the_vae_of_xl_has_the_models_precision",
    ): [
        ("dtype == torch.float16 and self.family.upcast_vae", "self.family.upcast_vae"),
    ],
    (
        "common.py",
        "Model.remember",
        "tests/test_families.py -k test_empty_prompt_of_xl_as_its_pipeline_says",
    ): [
        ('self.text_cache[""] = torch.zeros_like(self.text_cache[""])', "pass"),
    ],
    ("common.py", "Model.timesteps", "tests/test_pipeline.py -k test_too_many_steps"): [
        ("steps >= total", "steps > total"),
    ],
    ("common.py", "Model.alpha_sigma", "tests/test_pipeline.py -k test_sample_equals_stock_pipeline"): [
        ("clamp(min=-1)", "clamp(min=0)"),
    ],
    ("common.py", "Model.add_lora", "tests/test_pipeline.py -k test_bfloat16"): [
        ("parameter.data = parameter.data.float()", "pass"),
    ],
    ("common.py", "model_hash", "tests/test_inverse_noise_correction.py -k test_model_hash"): [
        ("digest.update(name.encode() +", "digest.update("),
    ],
    (
        "common.py",
        "Flow.load",
        "tests/test_inverse_noise_correction.py -k test_grid_is_even_unlike_the_schedulers_own",
    ): [
        ("network.requires_grad_(False)", "network"),
    ],
    ("common.py", "Flux.shift", "tests/test_families.py -k test_flux_with_a_constant_shift"): [
        ("return scheduler.shift", "return 1.0"),
    ],
    ("common.py", "load_model", "tests/test_model_folders.py -k test_one_of_height_and_width"): [
        ("(args.height, args.width)", "(args.width, args.height)"),
    ],
    ("common.py", "load_part", "tests/test_model_folders.py -k test_a_missing_weight_is_named"): [
        ('refuse_missing(part, info["missing_keys"])', "pass"),
    ],
    (
        "common.py",
        "Model.__init__",
        "tests/test_families.py -k test_large_images_are_decoded_one_at_a_time",
    ): [
        (">= 64:", ">= 10**6:"),
    ],
    ("common.py", "Model.set_scheduler", "tests/test_pipeline.py -k test_sample_equals_stock_pipeline"): [
        ("scheduler.final_alpha_cumprod.view(1)", "torch.ones(1)"),
    ],
    (
        "common.py",
        "Model.split",
        "tests/test_families.py -k test_states_and_pooled_embedding_both_reach_the_model",
    ): [
        ("[:, : self.pooled]", "[:, : self.pooled - 1]"),
    ],
    (
        "common.py",
        "Flow.velocity",
        "tests/test_inverse_noise_correction.py -k test_timesteps_of_a_scheduler_with_another_number_of_them",
    ): [
        ("self.scheduler.config.num_train_timesteps", "1000"),
    ],
    ("utils/runs.py", "last_words", "tests/test_model_folders.py -k test_weights_with_other_names"): [
        ('return f"error: {message}", 2', 'return f"error: {message}", 1'),
    ],
    ("utils/runs.py", "restore", "tests/test_diffusion_nft.py -k test_run_and_resume"): [
        ('optimizer.load_state_dict(state["optimizer"])', "pass"),
    ],
    ("utils/runs.py", "save_accepted", "tests/test_loop_graft.py -k test_equal_rewards"): [
        ("{prompt:06d}_{sample:03d}", "{sample:06d}_{prompt:03d}"),
    ],
    ("utils/runs.py", "check_output", "tests/test_bad_input.py -k test_found_before_the_model_loads"): [
        ("not path.exists() or", "path.exists() or"),
    ],
    ("utils/runs.py", "paired_table", "tests/test_equations.py -k test_paired_table"): [
        ("change.std() / len(change) ** 0.5", "change.std() / len(change)"),
    ],
    ("utils/runs.py", "stored_arguments", "tests/test_bad_input.py -k test_bad_stored_arguments"): [
        ("if not has_type(value, types[name]):", "if False:"),
    ],
    ("utils/runs.py", "write_atomically", "tests/test_diffusion_nft.py -k test_run_and_resume"): [
        ("os.replace(part, path)", "path.write_bytes(part.read_bytes())"),
    ],
    ("utils/runs.py", "save_accepted", "tests/test_loop_pgraft.py -k test_exponential"): [
        ("enumerate(rounds, 1)", "enumerate(rounds)"),
        ("rows[-len(latents) :]", "rows[: len(latents)]"),
    ],
    ("utils/runs.py", "stored_arguments", "tests/test_bad_input.py -k test_found_before_the_model_loads"): [
        ('values.pop("script", own) != own', 'values.pop("script", own) == 0'),
    ],
    (
        "utils/runs.py",
        "load_checkpoint",
        "tests/test_faults.py -k test_every_flipped_bit_of_a_checkpoint_is_refused_or_harmless",
    ): [
        ("if file.testzip():", "if False:"),
    ],
    ("utils/runs.py", "has_type", "tests/test_bad_input.py -k test_types_of_stored_arguments"): [
        ("all(has_type", "any(has_type"),
        ("if kind is float else kind", "if kind is int else kind"),
    ],
    ("utils/runs.py", "check_output", "tests/test_bad_input.py -k test_a_folder_that_must_not_be_written"): [
        ("or not os.access(parent, os.W_OK)", ""),
    ],
    ("utils/runs.py", "lengthen", "tests/test_more_rounds.py -k test_a_finished_run"): [
        ('f"results_{stored[LONGER]}_{LONGER}.json"', '"results_old.json"'),
        ("stored[LONGER] < getattr(args, LONGER)", "True"),
    ],
    ("utils/runs.py", "hash_inputs", "tests/test_inputs.py -k test_what_belongs_to_the_inputs"): [
        ("*(f for f in Path(name).iterdir() if f.is_dir())", ""),
    ],
    ("utils/runs.py", "of_one_run", "tests/test_more_rounds.py -k test_which_arguments_are_of_one_run"): [
        ("old | {LONGER: 0} == new | {LONGER: 0}", "True"),
        ("old.get(LONGER, math.inf) < new.get(LONGER, 0) and", ""),
    ],
    ("utils/runs.py", "log_metrics", "tests/test_run.py -k test_killed_and_resumed"): [
        ("purge_step=step", "purge_step=None"),
    ],
    ("utils/runs.py", "make_run_folder", "tests/test_run.py -k test_run_folder"): [
        ('{"script": script_of(type(args))} |', ""),
    ],
    (
        "utils/runs.py",
        "check_inputs",
        "tests/test_inputs.py -k test_a_run_with_changed_inputs_is_not_resumed",
    ): [
        ("stored | hashes", "hashes"),
        ('if changed[0] in stored else "added"', 'if changed[0] in hashes else "added"'),
    ],
    ("utils/runs.py", "hash_inputs", "tests/test_inputs.py -k test_hashes_of_inputs"): [
        ('(f / "args.json").exists())', '(f / "no.json").exists())'),
        ('f"{file.stat().st_size} ".encode() +', ""),
    ],
    ("utils/runs.py", "restore", "tests/test_run.py -k test_the_scaler_is_restored"): [
        ('scaler.load_state_dict(state["scaler"])', "pass"),
    ],
    (
        "utils/runs.py",
        "forget_evaluation",
        "tests/test_more_rounds.py -k test_an_evaluation_that_was_the_last_only",
    ): [
        ("row.update(dict.fromkeys(evaluated, math.nan))", "pass"),
        ("done in (0, args.rounds)", "done == 0"),
    ],
    ("utils/runs.py", "parse_arguments", "tests/test_more_rounds.py -k test_what_is_refused"): [
        ("given > kept", "given != kept"),
    ],
    ("utils/runs.py", "last_words", "tests/test_bad_input.py -k test_out_of_memory_is_one_line"): [
        ("can't allocate memory", "can't allocate a thing"),
    ],
    ("utils/runs.py", "load_checkpoint", "tests/test_run.py -k test_a_checkpoint_of_other_arguments"): [
        ("if not of_one_run(", "if False and not of_one_run("),
    ],
    (
        "utils/runs.py",
        "parse_arguments",
        "tests/test_inputs.py -k test_a_run_goes_on_on_the_device_there_is",
    ): [
        ('dict.fromkeys(missing, "auto")', "{}"),
    ],
    ("utils/runs.py", "last_words", "tests/test_run.py -k test_what_an_interrupted_run_is_told"): [
        ('if begun else "Nothing was written."', 'if folder else "Nothing was written."'),
    ],
    ("utils/runs.py", "restore", "tests/test_more_rounds.py -k test_killed_after_it_was_given_more"): [
        ('time.perf_counter() - state["seconds"]', "time.perf_counter()"),
    ],
    ("utils/prompts.py", "read_prompts", "tests/test_bad_input.py -k test_bad_prompt_files"): [
        ("zip(prompts, rows, strict=True) if p]", "zip(prompts, rows, strict=True)]"),
    ],
    ("utils/prompts.py", "choose_column", "tests/test_bad_input.py -k test_published_prompt_files"): [
        ("c.strip().lower()", "c.strip()"),
    ],
    ("utils/prompts.py", "prompt_files", "tests/test_bad_input.py -k test_too_few_prompts"): [
        ('EVAL_PROMPTS if file == TRAIN_PROMPTS else ""', "EVAL_PROMPTS"),
    ],
    ("utils/prompts.py", "choose_column", "tests/test_bad_input.py -k test_column_of_prompts"): [
        ("reversed(list(columns))", "list(columns)"),
    ],
    (
        "utils/prompts.py",
        "read_prompt_sets",
        "tests/test_bad_input.py -k test_found_before_the_model_loads",
    ): [
        ("len(held_out) < 2", "len(held_out) < 1"),
    ],
    ("utils/prompts.py", "read_table", "tests/test_bad_input.py -k test_bad_prompt_files"): [
        ("line = reader.line_num + 1  # on", "line = 0  # on"),
    ],
    ("utils/prompts.py", "read_table", "tests/test_bad_input.py -k test_read_prompts"): [
        ("dict.fromkeys(columns) |", ""),
    ],
    ("utils/prompts.py", "warn_of_overlap", "tests/test_bad_input.py -k test_overlap_of_prompts"): [
        ("p.casefold() in trained", "p in trained"),
    ],
    (
        "utils/prompts.py",
        "read_prompt_sets",
        "tests/test_run.py -k test_without_held_out_prompts_every_tenth_is_held_out",
    ): [
        ("if i % 10]", "]"),
    ],
    ("utils/images.py", "open_upright", "tests/test_inputs.py -k test_images_are_turned_as_exif_says"): [
        ("image = ImageOps.exif_transpose(image)", "pass"),
    ],
    ("utils/images.py", "open_upright", "tests/test_inputs.py -k test_images_are_read_as_they_look"): [
        ('"white"', '"black"'),
    ],
    ("utils/images.py", "open_upright", "tests/test_inputs.py -k test_levels_of_16_bits_are_kept_apart"): [
        ("/ 257", "/ 256"),
    ],
    ("utils/images.py", "read_images", "tests/test_inputs.py -k test_levels_of_16_bits_are_kept_apart"): [
        ("permute(2, 0, 1)", "permute(2, 1, 0)"),
    ],
    (
        "utils/images.py",
        "read_images",
        "tests/test_inverse_noise_correction.py -k test_the_middle_square_is_taken",
    ): [
        ("left, top = (image.width - side) // 2, (image.height - side) // 2", "left, top = 0, 0"),
    ],
    (
        "utils/user_code.py",
        "UserModule.running",
        "tests/test_own_rewards.py -k test_a_file_that_fails_leaves_nothing",
    ): [
        ("self.settings = [read() for read, _ in SETTINGS]", "pass"),
    ],
    (
        "utils/user_code.py",
        "UserModule.running",
        "tests/test_own_rewards.py -k test_a_file_is_a_module_under_its_own_name",
    ): [
        ("sys.modules |= hidden", "pass"),
    ],
    (
        "utils/user_code.py",
        "UserModule.__init__",
        "tests/test_own_rewards.py -k test_worker_processes_that_import_the_file",
    ): [
        ("self.settings[0] = [str(self.folder), *self.settings[0]]", "pass"),
    ],
    (
        "utils/user_code.py",
        "UserModule.running",
        "tests/test_own_rewards.py -k test_random_rewards_depend_on_the_images",
    ): [
        ("np.random.seed(seed % 2**32)", "pass"),
    ],
    ("utils/user_code.py", "set_random_states", "tests/test_own_rewards.py -k test_global_state"): [
        ("np.random.set_state(states[1])", "pass"),
        ("random.setstate(states[0])", "pass"),
    ],
    ("utils/user_code.py", "UserModule.running", "tests/test_own_rewards.py -k test_global_state"): [
        ("set_random_states(states)", "pass"),
    ],
    ("utils/processes.py", "end_processes", "tests/test_torchrun.py -k test_nothing_fails_after_the_end"): [
        ("leave(0)", "pass"),
        ("atexit._run_exitfuncs()", "pass"),
    ],
    ("utils/processes.py", "gather", "tests/test_torchrun.py -k test_shares_make_the_whole"): [
        ("shares[i % SIZE][i // SIZE]", "shares[i // SIZE][i % SIZE]"),
    ],
    ("utils/processes.py", "sum_gradients", "tests/test_torchrun.py -k test_sum_of_gradients"): [
        ("if p.grad is None else p.grad", "if p.grad is None else p.grad / SIZE"),
    ],
    (
        "rewards.py",
        "text_embeddings",
        "tests/test_reward_models.py -k test_batches_are_of_the_size_asked_for",
    ): [
        ("truncation=True", "truncation=False"),
    ],
    ("rewards.py", "OwnReward.__call__", "tests/test_own_rewards.py -k test_arguments_are_copies"): [
        ("[str(p) for p in prompts]", "prompts"),
        ("[i.copy() for i in images]", "images"),
    ],
    ("rewards.py", "checked", "tests/test_rewards.py -k test_bad_results"): [
        ("if not values.isfinite().all():", "if values.isnan().any():"),
        ("(~values.isfinite()).nonzero()[0]", "values.isfinite().nonzero()[0]"),
    ],
    ("rewards.py", "image_statistics", "tests/test_rewards.py -k test_image_statistics"): [
        ("[..., 1].mean()", "[..., 2].mean()"),
    ],
    ("rewards.py", "load_frozen", "tests/test_reward_models.py -k test_damaged_checkpoint"): [
        ('if report["missing_keys"]:', "if False:"),
    ],
    ("rewards.py", "wants_metadata", "tests/test_own_rewards.py -k test_who_gets_metadata"): [
        ("not takes(function, 3) or not takes(function, 2)", "not takes(function, 3)"),
    ],
    ("rewards.py", "in_batches", "tests/test_reward_models.py -k test_batches_are_of_the_size_asked_for"): [
        ("prompts[i : i + size]", "prompts[:size]"),
    ],
    ("rewards.py", "split", "tests/test_rewards.py -k test_weighted_sum"): [
        ("piece.strip()", "piece"),
    ],
    ("rewards.py", "as_numbers", "tests/test_own_rewards.py -k test_numbers"): [
        ("len(values) == 2:", "len(values) == 3:"),
    ],
    ("rewards.py", "image_embeddings", "tests/test_reward_models.py -k test_aesthetic_score"): [
        ("F.normalize(embeddings.float(), dim=1)", "F.normalize(embeddings.float(), dim=0)"),
    ],
    ("rewards.py", "Reward.scores", "tests/test_rewards.py -k test_weighted_sum"): [
        ("total += weight * parts[name]", "total += parts[name]"),
    ],
    ("rewards.py", "as_numbers", "tests/test_own_rewards.py -k test_anything_but_numbers"): [
        ("if numbers.is_complex():", "if False:"),
    ],
    ("rewards.py", "diversity", "tests/test_rewards.py -k test_diversity"): [
        ("pixels[0].numel() ** 0.5", "pixels[0].numel()"),
    ],
    ("rewards.py", "edit_distance", "tests/test_ocr.py -k test_edit_distance"): [
        ("before[j] + 1", "before[j] + 2"),
        ("before[j - 1] + (letter != other)", "before[j - 1] + 1"),
    ],
    ("rewards.py", "ocr", "tests/test_ocr.py -k test_the_reader_gets_blue_first"): [
        ("[..., ::-1]", ""),
    ],
    ("rewards.py", "OwnReward.__call__", "tests/test_own_rewards.py -k test_factories"): [
        ("permute(0, 3, 1, 2)", "permute(0, 3, 2, 1)"),
        (".float() / 255", ".float()"),
    ],
    ("rewards.py", "Reward.scores", "tests/test_loop_graft.py -k test_interrupted_twice"): [
        ("if len(self.parts) > 1", "if len(self.parts) > 2"),
    ],
    ("rewards.py", "diversity", "tests/test_rewards.py -k test_diversity_of_images_that_are_not_square"): [
        ("min(64, images[0].height)", "min(64, images[0].width)"),
    ],
    ("rewards.py", "load_tokenizer", "tests/test_reward_models.py -k test_a_tokenizer_with_too_few_words"): [
        ("vocabulary / 2", "vocabulary / 200"),
    ],
    ("rewards.py", "split", "tests/test_rewards.py -k test_pieces_between_separators"): [
        ("max(0, depth +", "(depth +"),
    ],
    ("rewards.py", "read_rewards", "tests/test_rewards.py -k test_rewards_of_a_run"): [
        ("if spec and spec != reward]", "if spec]"),
    ],
    ("rewards.py", "target_text", "tests/test_ocr.py -k test_target_text"): [
        ('getattr(prompt, "metadata", {}).get("target")', "None"),
        (".lower()", ""),
    ],
    ("rewards.py", "text_score", "tests/test_ocr.py -k test_text_score"): [
        ("if wanted in seen:", "if seen == wanted:"),
        ("len(wanted)) / len(wanted)", "len(wanted)) / len(seen + wanted)"),
    ],
    ("rewards.py", "takes", "tests/test_own_rewards.py -k test_functions_that_do_not_tell_their_arguments"): [
        ("return count == 2", "return True"),
    ],
    ("rewards.py", "Reward.files", "tests/test_rewards.py -k test_files_that_a_reward_reads"): [
        ("if Path(checkpoint).is_dir()]", "]"),
    ],
    ("rewards.py", "as_numbers", "tests/test_rewards.py -k test_scores_are_a_copy"): [
        ("copy=True", "copy=False"),
    ],
    (
        "rewards.py",
        "OwnReward.__call__",
        "tests/test_own_rewards.py -k test_random_rewards_depend_on_the_images",
    ): [
        ('zlib.crc32(b"".join(i.tobytes() for i in images))', "0"),
    ],
    ("rewards.py", "Reward.__init__", "tests/test_rewards.py -k test_weights_that_are_no_numbers"): [
        ("if not math.isfinite(weight):", "if math.isnan(weight):"),
    ],
    (
        "benchmarks/evaluate.py",
        "load_policy",
        "tests/test_loop_baselines.py -k test_evaluation_with_everything_changed",
    ): [
        ("**options)", "timestep_spacing='leading')"),
    ],
    ("benchmarks/evaluate.py", "read_run", "tests/test_benchmark_run.py -k 'test_store and not stored'"): [
        ('stored | given | {"prompts": stored["prompts"]}', "stored | given"),
    ],
    ("benchmarks/evaluate.py", "evaluate_lora", "tests/test_loop_baselines.py -k test_evaluation_of_a_run"): [
        ("with model.lora_off():", "with model.lora_merged():"),
    ],
    (
        "benchmarks/evaluate.py",
        "switch_of",
        "tests/test_loop_baselines.py -k test_evaluation_with_everything_changed",
    ): [
        ("args.switch * model.train_timesteps", "args.switch * 999"),
    ],
    (
        "benchmarks/evaluate.py",
        "evaluate_policy",
        "tests/test_loop_baselines.py -k test_evaluation_with_everything_changed",
    ): [
        ('("standard", (zero, zero))', '("standard", learnt)'),
    ],
    (
        "benchmarks/evaluate.py",
        "read_run",
        "tests/test_loop_baselines.py -k test_a_switch_is_known_by_the_arguments_or_by_its_file",
    ): [
        ('"switch" in stored or', ""),
    ],
    (
        "benchmarks/evaluate.py",
        "read_task",
        "tests/test_evaluate.py -k test_one_prompt_has_no_standard_error",
    ): [
        ("if len(prompts) < 2:", "if not prompts:"),
    ],
    (
        "benchmarks/evaluate.py",
        "load_policy",
        "tests/test_evaluate.py -k test_bad_input_that_only_the_model_shows",
    ): [
        ('if stored["policy"] | shape != stored["policy"]:', "if False:"),
    ],
    (
        "benchmarks/evaluate.py",
        "read_run",
        "tests/test_evaluate.py -k test_bad_input_is_found_before_the_model_loads",
    ): [
        ('if method != "noise_ppo" and lora:', "if False:"),
    ],
    (
        "benchmarks/evaluate.py",
        "read_task",
        "tests/test_evaluate.py -k test_prompts_that_a_reward_does_not_understand",
    ): [
        ('reward.check_prompts(prompts, "--prompts")', "pass"),
    ],
    (
        "benchmarks/base.py",
        "sample_images",
        "tests/test_loop_baselines.py -k test_rewards_of_the_base_model",
    ): [
        ("derived_seed(tag, i, j)", "derived_seed(tag, j, i)"),
        ("for p in prompts for _ in range(samples)", "for _ in range(samples) for p in prompts"),
        ("temperature * draw_noise", "draw_noise"),
    ],
    (
        "benchmarks/base.py",
        "measure_rewards",
        "tests/test_loop_baselines.py -k test_rewards_of_the_base_model",
    ): [
        ("STEPS * (2 if", "STEPS * (1 if"),
        ('"calls": STEPS * n', '"calls": STEPS'),
        (".amax(2).mean(1)", ".mean(2).amax(1)"),
    ],
    ("benchmarks/base.py", "mean_and_se", "tests/test_loop_baselines.py -k test_rewards_of_the_base_model"): [
        ("len(values) ** 0.5", "len(values)"),
    ],
    ("benchmarks/path_kl.py", "path_kl", "tests/test_path_kl.py -k test_kl_of_gaussian_chains"): [
        ("x = tuned + std * noise[k + 1]", "x = base + std * noise[k + 1]"),
        ("(2 * std**2)", "(std**2)"),
        ("if k < switch_at:", "if k <= switch_at:"),
    ],
    ("benchmarks/path_kl.py", "measure", "tests/test_path_kl.py -k test_run_folders"): [
        ("by_prompt.std().item()", "torch.cat(values).std().item()"),
        (".view(-1, IMAGES).mean(1)", ".view(IMAGES, -1).mean(0)"),
    ],
    ("fashion/images.py", "read_sheet", "tests/test_fashion.py -k test_embedded_images"): [
        (".swapaxes(1, 2)", ""),
    ],
    ("fashion/train.py", "train_flow", "tests/test_fashion.py -k test_updates_of_the_flow"): [
        ("min(0.999, (i + 1) / (i + 10))", "0.999"),
        ("torch._foreach_copy_(parameters, average)", "pass"),
        ('enabled=args.dtype == "bfloat16"', "enabled=False"),
    ],
    ("benchmarks/black_ground.py", "black_ground", "tests/test_black_ground.py"): [
        ("images, 3, stride=1, padding=1", "images, 1, stride=1, padding=0"),
        ("< BLACK", "> BLACK"),
    ],
    ("benchmarks/black_ground.py", "measure_run", "tests/test_black_ground.py -k test_runs"): [
        ("euler_sample(flow.velocity, z, sigmas)", "euler_sample(flow.velocity, eps, sigmas)"),
        ('corrector.settings["scale"] * eps', "eps"),
        ("corrector.destandardise(eps)", "eps"),
        ('stored["steps"], stored["grid_power"]', 'stored["steps"], 1.0'),
    ],
    ("benchmarks/black_ground.py", "deviations", "tests/test_black_ground.py"): [
        ("z[~ground]", "z"),
    ],
    ("benchmarks/black_ground.py", "measure", "tests/test_black_ground.py"): [
        ("samples[black_ground(samples)]", "samples"),
        ("ground[inversion.converged]", "ground[: inversion.converged.sum()]"),
        ("1 - len(z) / len(images)", "len(z) / len(images)"),
        ("flow.grid(steps, power)", "flow.grid(steps, 1.0)"),
    ],
    ("benchmarks/judges.py", "samples_of", "tests/test_judges.py"): [
        ("if steps == run_args.steps else 1.0", "if steps else 1.0"),
        ("if corrector.gaussian:", "if True:"),
    ],
    ("benchmarks/judges.py", "main", "tests/test_judges.py"): [
        ("batch, args.judge)", "batch)"),
        ('{"floor": images["floor"]}', '{"floor": images["invert"]}'),
        ('reference = features(images["reference"])', 'reference = features(images["floor"])'),
        ('images["invert"][:n], images["reference"][:n]', 'images["reference"][:n], images["invert"][:n]'),
    ],
    ("benchmarks/judges.py", "kernel_distance", "tests/test_judges.py -k test_kernel_distance"): [
        (" - values.trace()", ""),
        ("** 3", "** 2"),
        ("/ x.shape[1]", ""),
    ],
    ("benchmarks/judges.py", "share_of_copies", "tests/test_judges.py -k test_share_of_copies"): [
        ("to_inverted < to_reference", "to_inverted > to_reference"),
        (".amin(1)", ".mean(1)"),
    ],
    ("benchmarks/judges.py", "imagenet_features", "tests/test_judges.py -k test_features_of_imagenet"): [
        (".clamp(-1, 1)", ""),
        (".eval()", ""),
        ("images.split(sample_batch)", "[images]"),
    ],
    (
        "benchmarks/run.py",
        "make_flow",
        "tests/test_benchmark_run.py -k test_the_flow_of_an_arm_is_trained_first",
    ): [
        ('(ROOT / flow / "scheduler").exists()', "(ROOT / flow).exists()"),
        ("shutil.rmtree(ROOT / flow, ignore_errors=True)", "pass"),
        ("--seed {seed} --no", "--no"),
    ],
    ("fashion/train.py", "main", "tests/test_fashion.py -k test_training_script"): [
        ('add_data_noise(images, args.data_noise, "train")', "images"),
        ("flow.network.half()", "pass"),
    ],
    ("fashion/train.py", "train_flow", "tests/test_fashion.py -k test_mean_losses_are_of_a_tenth"): [
        ("total.item() / ((i % tenth) + 1)", "total.item() / tenth"),
    ],
    ("inverse_noise_correction.py", "prepare", "tests/test_fashion.py -k test_another_size"): [
        ('"fashion" if sheets else standard', '"fashion" if not args.data else standard'),
        ("if args.data and sheets else files", "if False else files"),
    ],
    ("inverse_noise_correction.py", "load_images", "tests/test_fashion.py -k test_another_size"): [
        ("reference_images(sheets), training_images(sheets)", "reference_images(sheets), training_images()"),
    ],
    (
        "inverse_noise_correction.py",
        "find_enough_images",
        "tests/test_inputs.py -k test_files_that_are_passed_over_are_counted",
    ): [
        ("of_runs & set(name.parents)", "False"),
    ],
    (
        "inverse_noise_correction.py",
        "check_images",
        "tests/test_bad_input.py -k test_found_before_the_model_loads",
    ): [
        ("if sheets and shape != judged:", "if False:"),
    ],
    (
        "inverse_noise_correction.py",
        "split_images",
        "tests/test_inverse_noise_correction.py -k test_load_images",
    ): [
        ("return images[:count], images[count:]", "return images[count:], images[:count]"),
    ],
    (
        "inverse_noise_correction.py",
        "noise_statistics",
        "tests/test_inverse_noise_correction.py -k test_noise_statistics",
    ): [
        ("square.sqrt().std()", "square.std()"),
        ("0.5 * (across.mean() + down.mean())", "across.mean()"),
        ("z.var(0).mean()", "z.var()"),
    ],
    (
        "inverse_noise_correction.py",
        "find_enough_images",
        "tests/test_inverse_noise_correction.py -k test_images_for_both_sides",
    ): [
        ("min(reference, len(files) - reference) < 20", "reference < 20"),
    ],
    (
        "inverse_noise_correction.py",
        "usage_code",
        "tests/test_inverse_noise_correction.py -k test_snippet_makes_the_evaluated_image",
    ): [
        ('derived_seed("eval", 0)', 'derived_seed("eval", 1)'),
    ],
}
