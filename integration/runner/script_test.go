package runner

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// local is a driver whose guest is this machine: it runs the scripts in bash and
// maps their exit codes as a driver should.
func local(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	return fake{
		config: `echo '{"builds_dir":"` + dir + `/builds","cache_dir":"` + dir + `/cache"}'`,
		run: `bash < "$1"; code=$?; rm -f "$BUILD_EXIT_CODE_FILE"; [ $code = 0 ] && exit
			echo $code > "$BUILD_EXIT_CODE_FILE"; exit $BUILD_FAILURE_EXIT_CODE`,
	}.runner(t)
}

func TestScriptsRun(t *testing.T) {
	cfg := local(t)
	const awkward = "a'b\"c\\d$HOME`e`\té\x01\n*? !"
	o := runJob(t, cfg, Job{
		Variables: []Variable{
			{Key: "AWKWARD", Value: awkward, Raw: true}, {Key: "FILE", Value: "line 1\nline 2\n", File: true}, {Key: "EMPTY"},
		},
		Script: []string{
			`printf '<%s>\n' "$AWKWARD" "$EMPTY"`, `pwd`, `cat "$FILE"`, `cat; echo no input`, "if true; then\n  echo 'several lines'\nfi",
			`echo "on stderr" >&2`, ``, `false | true && echo "not with pipefail" || echo "pipefail"`,
		},
		AfterScript: []string{`echo after $CI_JOB_STATUS`},
	})
	if !o.Green() {
		t.Errorf("status %s, error %v", o.Status, o.Err)
	}
	// The order between stdout and stderr is not kept.
	wantLog(t, o,
		"Running on "+hostname()+" via "+hostname()+"...\n",
		"\x1b[32;1mSkipping Git repository setup\x1b[0;m\n",
		"\x1b[32;1m$ pwd\x1b[0;m\n", "/builds/group/project\n",
		"<"+awkward+">\n<>\n", "line 1\nline 2\n", "no input\n", "on stderr\n", "pipefail\n",
		"\x1b[32;1m$ if true; then # collapsed multi-line command\x1b[0;m\n", "several lines\n",
		"\x1b[32;1mRunning after script...\x1b[0;m\n", "\x1b[32;1m$ echo after $CI_JOB_STATUS\x1b[0;m\nafter success\n")
	var left []string
	root := filepath.Dir(strings.TrimSpace(configured(t, cfg)))
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			left = append(left, path)
		}
		return err
	})
	if err != nil || len(left) > 0 {
		t.Errorf("cleanup_file_variables has left %v (%v)", left, err)
	}
}

// configured is the builds folder that the driver's config stage names.
func configured(t *testing.T, cfg Config) string {
	t.Helper()
	ex, err := New(cfg, Job{})
	if err != nil {
		t.Fatal(err)
	}
	if r := ex.Config(t.Context()); r.Err != nil {
		t.Fatal(r.Err)
	}
	ex.Cleanup(t.Context())
	return ex.build.builds
}

// Cache and artifacts are gitlab-runner's work in the guest, with these
// arguments; without it they are left out, and the job goes on.
func TestHelperScripts(t *testing.T) {
	job := Job{
		ID: 7, Script: []string{"true"}, AfterScript: []string{"true"},
		Cache: []string{"vendor/"}, Artifacts: []string{"out/", "a b"}, Dependencies: []string{"build"},
	}
	cfg := local(t)
	cfg.Env = append(cfg.Env, "PATH=/usr/bin:/bin")
	o := runJob(t, cfg, job)
	if !o.Green() || len(o.Calls) != 12 {
		t.Errorf("status %s, error %v, %d calls", o.Status, o.Err, len(o.Calls))
	}
	for _, what := range []string{"Extracting cache", "Downloading artifacts", "Creating cache", "Uploading artifacts"} {
		wantLog(t, o, "\x1b[0;33mMissing gitlab-runner. "+what+" is disabled.\x1b[0;m\n")
	}

	cfg = local(t)
	bin := t.TempDir()
	helper := "#!/bin/sh\n[ $1 = --version ] || { printf '<%s>' \"$@\"; echo; }\n"
	if err := os.WriteFile(filepath.Join(bin, "gitlab-runner"), []byte(helper), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg.Env = append(cfg.Env, "PATH="+bin+":/usr/bin:/bin")
	o = runJob(t, cfg, job)
	cache := filepath.Dir(configured(t, cfg)) + "/cache/group/project/default/cache.zip"
	wantLog(t, o,
		"<cache-extractor><--file><"+cache+"><--timeout><10>\n", "<cache-archiver><--file><"+cache+"><--timeout><10><--path><vendor/>\n",
		"<artifacts-downloader><--url><https://gitlab.example.com><--token><[MASKED]><--id><6>\n",
		"<artifacts-uploader><--url><https://gitlab.example.com><--token><[MASKED]><--id><7><--path><out/><--path><a b>\n")
}

func TestScriptExitCodes(t *testing.T) {
	for command, want := range map[string]int{"exit 7": 7, "exit 2": 2, "exit 255": 255, "sh -c 'kill -9 $$'": 137, "false | true": 1} {
		if o := runJob(t, local(t), Job{Script: []string{command, "echo unreachable >&2; exit 99"}}); o.ExitCode != want || o.FailureReason != ScriptFailure {
			t.Errorf("%s: exit code %d, reason %s, want %d", command, o.ExitCode, o.FailureReason, want)
		}
	}
}

// The frame's shape is part of what drivers see: a shebang first, TERM trapped,
// input from /dev/null, exit 0 last.
func TestScriptFrame(t *testing.T) {
	ex, err := New(local(t), Job{})
	if err != nil {
		t.Fatal(err)
	}
	defer ex.Cleanup(t.Context())
	script := ex.WrapScript("echo 'x'\n")
	const want = `#!/usr/bin/env bash

trap 'exit 1' TERM

case "$(set -o)" in *"pipefail"*) set -o pipefail;; esac; set -o errexit
set +o noclobber
(trap 'exit 1' TERM; eval $'echo \'x\'\n') < /dev/null
exit 0
`
	if script != want {
		t.Errorf("script:\n%s\nwant:\n%s", script, want)
	}
	for _, stage := range []string{"prepare_script", "get_sources", "cleanup_file_variables", "clear_worktree"} {
		if s := ex.Script(stage); !strings.HasPrefix(s, "#!/usr/bin/env bash\n") || !strings.HasSuffix(s, ") < /dev/null\nexit 0\n") {
			t.Errorf("%s:\n%s", stage, s)
		}
	}
	for _, stage := range []string{"restore_cache", "after_script", "build_script", "step_release"} {
		if s := ex.Script(stage); s != "" {
			t.Errorf("%s of a job without one:\n%s", stage, s)
		}
	}
}

func TestBashQuote(t *testing.T) {
	var all []byte
	for c := 1; c < 256; c++ {
		all = append(all, byte(c))
	}
	for _, s := range []string{"", "plain-1_2.3/4", "two words", string(all), "-n", "$'", "\\'"} {
		out, err := exec.CommandContext(t.Context(), "bash", "-c", "printf %s "+bashQuote(s)).Output()
		if s == "-n" {
			out, err = exec.CommandContext(t.Context(), "bash", "-c", "printf '%s' "+bashQuote(s)).Output()
		}
		if err != nil || string(out) != s {
			t.Errorf("bash reads %s as %q (%v), want %q", bashQuote(s), out, err, s)
		}
	}
}
