package runner

import (
	"fmt"
	"strconv"
	"strings"
)

// Script generates the whole script of a sub-stage in the form that Runner's
// bash writer gives it, or takes the job's own; "" means that the sub-stage is
// left out. The name of the job's main script is step_script, as in Runner;
// build_script is taken for it.
func (ex *Executor) Script(stage string) string {
	if stage == "build_script" {
		stage = "step_script"
	}
	job := ex.build.job
	if script, ok := job.Scripts[stage]; ok {
		return script
	}
	switch stage {
	case "prepare_script":
		return ex.PrepareScript()
	case "get_sources":
		return ex.GetSourcesScript()
	case "clear_worktree":
		return ex.clearWorktreeScript()
	case "after_script":
		if len(job.AfterScript) == 0 {
			return ""
		}
		return ex.AfterScript(job.AfterScript...)
	case "cleanup_file_variables":
		return ex.CleanupScript()
	case "restore_cache":
		if len(job.Cache) > 0 {
			return ex.helperScript("Extracting cache", "Checking cache for default...",
				"cache-extractor", "--file", ex.build.cache+"/default/cache.zip", "--timeout", "10")
		}
	case "archive_cache":
		if len(job.Cache) > 0 {
			return ex.helperScript("Creating cache", "Creating cache default...",
				append([]string{"cache-archiver", "--file", ex.build.cache + "/default/cache.zip", "--timeout", "10"}, paths(job.Cache)...)...)
		}
	case "download_artifacts":
		if len(job.Dependencies) > 0 {
			return ex.helperScript("Downloading artifacts", "Downloading artifacts for "+strings.Join(job.Dependencies, ", ")+"...",
				"artifacts-downloader", "--url", serverURL, "--token", job.token(), "--id", strconv.FormatInt(job.ID-1, 10))
		}
	case "upload_artifacts_on_success":
		if len(job.Artifacts) > 0 {
			return ex.helperScript("Uploading artifacts", "Uploading artifacts...",
				append([]string{"artifacts-uploader", "--url", serverURL, "--token", job.token(), "--id", strconv.FormatInt(job.ID, 10)}, paths(job.Artifacts)...)...)
		}
	}
	for _, step := range job.steps() {
		if stage == "step_"+step.Name {
			return ex.StepScript(step.Script...)
		}
	}
	return ""
}

// helperScript is the script of a sub-stage that gitlab-runner does in the
// guest.
func (ex *Executor) helperScript(what, notice string, args ...string) string {
	w := ex.scriptWithVariables(true)
	w.linef("cd %s", bashQuote(ex.build.project))
	w.linef("if gitlab-runner --version >/dev/null 2>&1 ; then")
	w.linef("  echo %s", bashQuote(boldGreen+notice+reset))
	for i, arg := range args {
		args[i] = bashQuote(arg)
	}
	w.linef("  gitlab-runner %s", strings.Join(args, " "))
	w.linef("else")
	w.linef("  echo %s", bashQuote(yellow+"Missing gitlab-runner. "+what+" is disabled."+reset))
	w.linef("fi")
	return ex.WrapScript(w.String())
}

func paths(files []string) []string {
	var args []string
	for _, file := range files {
		args = append(args, "--path", file)
	}
	return args
}

// PrepareScript is the script of prepare_script, which only says where the job
// runs.
func (ex *Executor) PrepareScript() string {
	w := &scriptWriter{}
	w.linef(`echo "Running on $(hostname) via %s..."`, hostname())
	w.remove(ex.build.tmpDir()+"/gitlab_runner_env", ex.build.tmpDir()+"/masking.db")
	return ex.WrapScript(w.String())
}

// GetSourcesScript is the script of get_sources with GIT_STRATEGY none.
func (ex *Executor) GetSourcesScript() string {
	w := ex.scriptWithVariables(true)
	builds := ex.build.builds
	w.linef("export GIT_TERMINAL_PROMPT=0")
	w.linef("export GCM_INTERACTIVE=Never")
	w.linef("export GIT_LFS_SKIP_SMUDGE=1")
	w.notice("Skipping Git repository setup")
	w.linef("mkdir -p %s", bashQuote(ex.build.project))
	w.notice("Skipping Git checkout")
	w.notice("Skipping Git submodules setup")
	w.linef("if [ -e %q ]; then", builds+"/.gitlab-build-uid-gid")
	w.linef("  if [ -d %q ]; then", builds)
	w.linef(`    chown -R "$(stat -c '%%u:%%g' '%s/.gitlab-build-uid-gid')" '%s'`, builds, builds)
	w.linef("  fi")
	w.linef("fi")
	w.rejectCredentials()
	return ex.WrapScript(w.String())
}

func (ex *Executor) clearWorktreeScript() string {
	w := ex.scriptWithVariables(true)
	w.notice("Deleting tracked and untracked files...")
	w.linef("if [ -d %q ]; then", ex.build.project)
	w.linef("  cd %s", bashQuote(ex.build.project))
	w.linef(`  git "rm" "-rf" "--ignore-unmatch" "."`)
	w.linef(`  git "clean" "-ffdx"`)
	w.linef("fi")
	return ex.WrapScript(w.String())
}

// StepScript is the script of build_script, or of another step, for these
// commands: each is echoed in green with a dollar sign before it runs.
func (ex *Executor) StepScript(commands ...string) string {
	w := ex.scriptWithVariables(true)
	w.linef("cd %s", bashQuote(ex.build.project))
	w.commands(commands)
	return ex.WrapScript(w.String())
}

// AfterScript is the script of after_script for these commands.
func (ex *Executor) AfterScript(commands ...string) string {
	w := ex.scriptWithVariables(true)
	w.linef("cd %s", bashQuote(ex.build.project))
	w.notice("Running after script...")
	w.commands(commands)
	return ex.WrapScript(w.String())
}

// CleanupScript is the script of cleanup_file_variables.
func (ex *Executor) CleanupScript() string {
	w := ex.scriptWithVariables(false)
	tmp, git := ex.build.tmpDir(), ex.build.project+"/.git"
	w.rejectCredentials()
	w.remove(tmp+"/gitlab_runner_env", tmp+"/masking.db", tmp+"/.gitlab-runner.ext.conf", tmp+"/.glr.gconf")
	for _, v := range ex.build.variables() {
		if v.File {
			w.remove(tmp + "/" + v.Key)
		}
	}
	w.remove(git+"/index.lock", git+"/shallow.lock", git+"/HEAD.lock", git+"/hooks/post-checkout", git+"/config.lock")
	w.linef("if [ -d %q ]; then", git+"/refs")
	w.linef(`  et='+' ; find /dev/null -exec true {} + 2>/dev/null || et=';' ; find %q -name "*.lock" -type f -exec rm -f {} "${et}"`, git+"/refs")
	w.linef("fi")
	w.remove(ex.build.builds + "/.gitlab-build-uid-gid")
	return ex.WrapScript(w.String())
}

// WrapScript puts shell code into the frame of every generated script: TERM is
// trapped, errexit and pipefail are set, the code runs in a subshell with its
// standard input at /dev/null, and the end is exit 0.
func (ex *Executor) WrapScript(body string) string {
	shell := ex.build.shell
	if shell != "sh" {
		shell = "bash"
	}
	return "#!/usr/bin/env " + shell + "\n\n" +
		"trap 'exit 1' TERM\n\n" +
		`case "$(set -o)" in *"pipefail"*) set -o pipefail;; esac; set -o errexit` + "\n" +
		"set +o noclobber\n" +
		"(trap 'exit 1' TERM; eval " + bashQuote(body) + ") < /dev/null\n" +
		"exit 0\n"
}

// scriptWithVariables begins a script that exports the job's variables, and
// writes file variables to their files if asked to.
func (ex *Executor) scriptWithVariables(files bool) *scriptWriter {
	w := &scriptWriter{}
	tmp := ex.build.tmpDir()
	for _, v := range ex.build.variables() {
		if v.File {
			file := tmp + "/" + v.Key
			if files {
				w.linef("mkdir -p %q", tmp)
				w.linef("printf '%%s' %s > %q", bashQuote(v.Value), file)
			}
			v.Value = file
		}
		w.linef("export %s=%s", bashQuote(v.Key), bashQuote(v.Value))
	}
	env := tmp + "/gitlab_runner_env"
	w.linef("export GITLAB_ENV=%s", bashQuote(env))
	w.linef("mkdir -p %q", tmp)
	w.linef("touch %q", env)
	w.linef(`while read -r line; do export "$line"; done < %q`, env)
	return w
}

type scriptWriter struct{ strings.Builder }

func (w *scriptWriter) linef(format string, args ...any) {
	fmt.Fprintf(w, format+"\n", args...)
}

// notice echoes a line in the green of Runner's own messages.
func (w *scriptWriter) notice(text string) {
	w.linef("echo %s", bashQuote(boldGreen+text+reset))
}

func (w *scriptWriter) commands(commands []string) {
	for _, command := range commands {
		command = strings.TrimSpace(command)
		first, _, more := strings.Cut(command, "\n")
		switch {
		case command == "":
			w.linef("echo")
			continue
		case more:
			w.notice("$ " + first + " # collapsed multi-line command")
		default:
			w.notice("$ " + first)
		}
		w.linef("%s", command)
	}
}

func (w *scriptWriter) remove(files ...string) {
	for _, file := range files {
		w.linef(`rm "-f" %q`, file)
	}
}

func (w *scriptWriter) rejectCredentials() {
	w.linef("echo %s | git credential reject || true", bashQuote("url="+serverURL+"\nusername=gitlab-ci-token"))
}

// bashQuote makes one shell word of s, as $'…' where it needs quotes.
func bashQuote(s string) string {
	if s == "" {
		return "''"
	}
	var b strings.Builder
	plain := true
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("_-./,@", c) >= 0:
			b.WriteByte(c)
			continue
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\r':
			b.WriteString(`\r`)
		case c == '\t':
			b.WriteString(`\t`)
		case c == '\'' || c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c >= ' ' && c <= '~':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, `\x%02x`, c)
		}
		plain = false
	}
	if plain {
		return b.String()
	}
	return "$'" + b.String() + "'"
}
