import time, os, signal, pytest, random, subprocess
from tests.end_to_end.stack import *
from tests.end_to_end.test_faults import recipe
from tests.checkpoints import Family
def test_stop(embedded, vit):
    worker = embedded
    pair = Family(vit.folder, ("cars","pets"))
    worker.upload(vit.folder, "s3://models/faults/")
    for n in range(30):
        if not worker.worker.is_running: worker.worker.start()
        worker.run(pair.recipe("s3://models/faults/", method={"name": "average"}))
        job_id = worker.submit({**recipe(pair), "output": {"shard_bytes": 1024}})["id"]
        size = len(worker.worker._log.read_bytes())
        count = random.randint(2, 12)
        until(lambda: worker.worker._log.read_bytes()[size:].count(b"received") >= count, "x", lambda: "", every=0.0005)
        t=time.time(); p=worker.worker._process
        p.terminate()
        try:
            p.wait(9)
        except Exception:
            kids = subprocess.run(["pgrep","-P",str(p.pid)],capture_output=True,text=True).stdout.split()
            os.system(f"ps -o pid,ppid,stat,wchan:30,args --ppid {p.pid} | cut -c1-150")
            for k in [str(p.pid), *kids]:
                os.system(f"/tmp/pyspy/bin/py-spy dump --pid {k} | cut -c1-150; ls -l /proc/{k}/fd | grep -E 'pipe|socket' | cut -c40-120")
            print("HUNG", worker.worker._log.read_text()[-600:])
            worker.worker.kill()
            break
        print("STOP", time.time()-t)
        worker.worker.kill()
        worker.client.post(f"/v1/merges/{job_id}/cancel")
