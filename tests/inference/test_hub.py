"""`mgcc push` and `mgcc pull` against a Hub of their own: a local HTTP server that speaks the Hub's API."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from predict_runs import bytes_in, files_in, save_run

from mgcc_dist import export, pull, push
from mgcc_dist.common.errors import UserError

TOKEN = "hf_of_a_test"
COMMIT = "c" * 40
PICKLE = b"\x80\x04K\x01."


@dataclass
class Hub:
    """Repositories by name, and what was asked."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, content, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code, message):
            self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("/api/models/"):
                repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                if repo == "lab/broken":
                    return self.refuse(503, "", "maintenance")
                if repo not in hub.repos:
                    return self.refuse(401, "RepoNotFound", "Repository not found")
                if revision not in ("", "main", COMMIT):
                    return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.repos[repo].items()]
                return self.answer(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})
            repo, _, name = path[1:].partition(f"/resolve/{COMMIT}/")
            if name not in hub.repos.get(repo, {}):
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.answer(200, hub.repos[repo][name], X_Repo_Commit=COMMIT, ETag=f'"{name}"')

        do_HEAD = do_GET

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(401, "", "Invalid username or password.")
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                hub.repos.setdefault(repo, {})
                return self.answer(200, {"url": f"{hub.url}/{repo}"})
            if path.endswith("/preupload/main"):
                files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
                return self.answer(200, {"files": [{**each, "shouldIgnore": False} for each in files]})
            if path.endswith("/commit/main"):
                repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
            return self.answer(200, {"errors": [], "warnings": []})

    return Handler


@pytest.fixture(scope="module")
def served():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(served, monkeypatch, tmp_path):
    served.repos, served.requests = {}, []
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return served


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    run = save_run(folder / "run")
    export.main(["--run", str(run), "--to", "safetensors", "--out", str(folder / "tiny")])
    return folder / "tiny"


def test_a_pushed_model_comes_back_and_nothing_else_is_transferred(hub, model, tmp_path, monkeypatch):
    (model / ".cache").mkdir(exist_ok=True)
    (model / ".cache" / "secret.txt").write_text("of this machine")
    push.main(["lab/tiny", "--model", str(model)])
    assert sorted(hub.repos["lab/tiny"]) == ["README.md", "model.json", "model.safetensors"]
    hub.repos["lab/tiny"] |= {"pytorch_model.bin": b"a pickle", ".gitattributes": b""}
    monkeypatch.chdir(tmp_path)
    pull.main(["lab/tiny"])
    assert bytes_in(tmp_path / "tiny") == {name: (model / name).read_bytes() for name in files_in(tmp_path / "tiny")}
    assert files_in(tmp_path) == ["tiny/README.md", "tiny/model.json", "tiny/model.safetensors"]
    assert not any("pytorch_model" in request for request in hub.requests)
    with pytest.raises(UserError, match=r"^--out tiny: already holds a model\. Choose another --out, or use --over"):
        pull.main(["lab/tiny"])
    pull.main(["lab/tiny", "--revision", COMMIT, "--overwrite"])


def test_a_model_that_was_changed_on_the_hub_leaves_no_folder(hub, model, tmp_path):
    push.main(["lab/tiny", "--model", str(model)])
    good = hub.repos["lab/tiny"]
    damaged = good["model.safetensors"][:-1] + b"\x01"
    for change, message in (
        (
            {"model.safetensors": damaged},
            "^lab/tiny: model.safetensors: is not the file that model.json next to it describes",
        ),
        ({"model.json": b"{}"}, "is not a mgcc-dist model file"),
    ):
        hub.repos["lab/tiny"] = good | change
        with pytest.raises(UserError, match=message):
            pull.main(["lab/tiny", "--out", str(tmp_path / "new")])
    pickled = json.loads(good["model.json"]) | {"files": {"model.safetensors": hashlib.sha256(PICKLE).hexdigest()}}
    hub.repos["lab/tiny"] = {"model.safetensors": PICKLE, "model.json": json.dumps(pickled).encode()}
    with pytest.raises(UserError, match=r"^lab/tiny: model\.safetensors: does not hold a segmentation network"):
        pull.main(["lab/tiny", "--out", str(tmp_path / "new")])
    hub.repos["lab/tiny"] = {"model.safetensors": good["model.safetensors"]}
    with pytest.raises(UserError, match=r"^lab/tiny: has no model\.json, so it is not a model folder of mgcc-dist"):
        pull.main(["lab/tiny", "--out", str(tmp_path / "new")])
    assert list(tmp_path.iterdir()) == []


def test_pull_leaves_other_folders_alone(hub, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a model folder"):
        pull.main(["lab/tiny", "--out", str(tmp_path), "--overwrite"])
    assert hub.requests == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "lab/nothing",
            r"^lab/nothing: does not exist, or your token may not see it\. Log in by `hf auth login`, or set",
        ),
        ("lab/tiny --revision v9", r"^lab/tiny: has no such revision\. Choose another --revision\."),
        ("lab/broken", r"^lab/broken: the Hub answered 503 \(.*\)\. Try again later\."),
        ("a/b/c", r"^a/b/c: is not the name of a repository, such as USER/NAME"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, words, message, monkeypatch):
    hub.repos["lab/tiny"] = {}
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match=message) as caught:
        pull.main([*words.split(), "--out", str(tmp_path / "new")])
    assert "\n" not in str(caught.value)


def test_push_without_a_token_or_with_a_wrong_one_says_how_to_log_in(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        UserError, match=r"^lab/tiny: the Hub answered 401 .* Log in by `hf auth login`, or set HF_TOKEN"
    ):
        push.main(["lab/tiny", "--model", str(model)])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        UserError, match=r"^lab/tiny: .* Log in by `hf auth login`, or set HF_TOKEN .* may write to it\.$"
    ):
        push.main(["lab/tiny", "--model", str(model)])
    assert hub.repos == {}


def test_without_a_network_the_error_is_one_line(hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    words = ["lab/tiny", "--out", str(tmp_path / "new")]
    with pytest.raises(UserError, match=r"^lab/tiny: the Hub can't be reached \(.*\)\. Check the network, or HF_ENDP"):
        pull.main(words)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(UserError, match=r"^lab/tiny: HF_HUB_OFFLINE is set, so the Hub is not asked\. Unset it\."):
        pull.main(words)
    with pytest.raises(UserError, match=r"^lab/tiny: HF_HUB_OFFLINE is set"):
        push.main(["lab/tiny", "--model", str(model)])


def test_only_a_complete_model_folder_is_pushed(hub, model, tmp_path):
    run = save_run(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"is not a model folder\. Export it first: mgcc export --run .* --to safetensors"
    ):
        push.main(["lab/tiny", "--model", str(run)])
    (tmp_path / "image.png").write_bytes(b"not a network")
    with pytest.raises(UserError, match=r"image\.png: does not hold a segmentation network"):
        push.main(["lab/tiny", "--model", str(tmp_path / "image.png")])
    assert hub.requests == []
