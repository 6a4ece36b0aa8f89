import time, os, signal, pytest
from tests.end_to_end.test_faults import *
def test_stop(stack, database, pair):
    worker = stack
    for n in range(4):
        worker.worker.start()
        worker.run(pair.recipe(PLACE, method={"name": "average"}))
        job_id = worker.submit({**recipe(pair), "output": {"shard_bytes": 4096}})["id"]
        t=time.time(); p=worker.worker._process
        p.terminate()
        try:
            p.wait(12)
        except Exception:
            os.system(f"ps -ef --forest | grep -A3 {p.pid} | cut -c1-150")
            os.kill(p.pid, signal.SIGUSR1); time.sleep(2)
            print("HUNG", worker.worker._log.read_text()[-9000:])
        print("STOP", time.time()-t)
        worker.worker.kill()
        worker.client.post(f"/v1/merges/{job_id}/cancel")
