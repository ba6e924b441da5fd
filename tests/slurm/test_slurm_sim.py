def test_smoke(slurm):
    job = slurm.sbatch("--nodes=3", "--exclusive", "--wrap", "srun hostname")
    slurm.wait(job, "COMPLETED", timeout_s=30)
    assert sorted(slurm.output(job).split()) == ["node1", "node2", "node3"]
