package settings

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// checkImage notes what is wrong with the keys of an image together, and fills
// in what follows from them. The image's own table is at path.
func (l *loader) checkImage(path keyPath, table map[string]any, img *Image) {
	if img.Volume == "" {
		l.report(path.with("volume"), "is missing", "name the base volume here or in [defaults]")
	}
	if img.Kernel == "" {
		for key, value := range map[string]string{"initrd": img.Initrd, "cmdline": img.Cmdline} {
			if value != "" {
				l.report(l.origin(path, table, key), "needs kernel, which is not set", "set kernel, or leave out "+key)
			}
		}
	}

	l.checkMax(path, table, "vcpus", uint64(img.VCPUs), uint64(img.MaxVCPUs), func(n uint64) string { return strconv.FormatUint(n, 10) })
	l.checkMax(path, table, "memory", img.Memory, img.MaxMemory, FormatSize)
	l.checkMax(path, table, "disk", img.Disk, img.MaxDisk, FormatSize)

	if img.Start == StartMemory {
		start := l.origin(path, table, "start")
		if img.Shell != ShellBash && img.Shell != ShellSh {
			l.report(start, fmt.Sprintf("%s needs a guest with sh, and the shell is %s", quote(string(img.Start)), img.Shell),
				`set start to "boot"`)
		}
		if img.Firmware == FirmwareUEFI {
			l.report(start, fmt.Sprintf("%s needs firmware that keeps no memory of its own, and it is %s", quote(string(img.Start)), img.Firmware),
				`set start to "boot", or firmware to "bios"`)
		}
	}

	for key, dir := range map[string]string{"builds_dir": img.BuildsDir, "cache_dir": img.CacheDir} {
		if hasDrive(dir) && img.Shell != ShellPwsh && img.Shell != ShellPowerShell {
			l.report(l.origin(path, table, key), fmt.Sprintf("%s is no path for the shell %s", quote(dir), img.Shell),
				`write a path that starts with /, or set shell to "pwsh" or "powershell"`)
		}
	}
	img.fillDirs()
}

// checkMax notes when a job could ask for less than it gets anyway.
func (l *loader) checkMax(path keyPath, table map[string]any, key string, value, most uint64, show func(uint64) string) {
	if most == 0 || most >= value {
		return
	}
	if _, ok := table["max_"+key]; !ok && table[key] != nil {
		l.report(path.with(key), fmt.Sprintf("%s is over max_%s, which is %s in [defaults]", show(value), key, show(most)),
			"lower it, or set max_"+key+" here, too")
		return
	}
	l.report(l.origin(path, table, "max_"+key), fmt.Sprintf("%s is below %s, which is %s", show(most), key, show(value)),
		"raise it, or leave it out")
}

// origin returns where an image has key from: its own table at path, or the
// defaults.
func (l *loader) origin(path keyPath, table map[string]any, key string) keyPath {
	if _, ok := table[key]; ok {
		return path.with(key)
	}
	return keyPath{"defaults", key}
}

// checkImageName notes when name, which is at path, is not that of a configured
// image. "" is left to others.
func (l *loader) checkImageName(path keyPath, s *Settings, name string) {
	if name == "" {
		return
	}
	if _, ok := s.Images[name]; ok && !s.BuiltIn {
		return
	}
	names := slices.Sorted(maps.Keys(s.Images))
	remedy := "write one of " + list(names)
	if s.BuiltIn {
		remedy = "add its table [images.NAME], or leave this out"
	} else if near := Nearest(name, names); near != "" {
		remedy = "did you mean " + quote(near) + "?"
	}
	l.report(path, quote(name)+" is not a configured image", remedy)
}
