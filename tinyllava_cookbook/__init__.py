"""TinyLLaVA Cookbook. Importing it is enough for the Auto classes of `transformers` to open its checkpoints.

Importing it does not import torch or transformers: the tables in which the Auto classes look names up are completed as
they are imported, and our classes are loaded when one of them is first asked for.
"""
__version__ = "0.1.0"

import logging as _logging
import sys as _sys

# transformers' trainer imports it, and it tells of a kernel that is optional
_logging.getLogger('bitsandbytes').setLevel(_logging.ERROR)

_TABLES = {'transformers.models.auto.configuration_auto': 'CONFIG_MAPPING',
           'transformers.models.auto.processing_auto': 'PROCESSOR_MAPPING'}
_OURS = 'tinyllava_cookbook'   # model_type of our checkpoints

class _Content(dict):
    "What was registered with an Auto class by hand, to which ours is added when it is looked for"
    def _load(self, key=_OURS):
        if getattr(key, 'model_type', key) != _OURS: return
        if any(getattr(o, 'model_type', o) == _OURS for o in super().keys()): return
        import tinyllava_cookbook.model.processor   # registers, and the model with it
        from tinyllava_cookbook.plugins import load_model_types   # those of parts
        load_model_types()
    def __contains__(self, key): self._load(key); return super().__contains__(key)
    def __getitem__(self, key): self._load(key); return super().__getitem__(key)
    def values(self): self._load(); return super().values()

def _complete(module):
    table = getattr(module, _TABLES[module.__name__])
    if not isinstance(table._extra_content, _Content): table._extra_content = _Content(table._extra_content)

class _Finder:
    "Completes a table right after its module was imported"
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _TABLES: return None
        others = (f for f in _sys.meta_path if f is not _Finder and hasattr(f, 'find_spec'))
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None: return spec
        run = spec.loader.exec_module
        def exec_module(module): run(module); _complete(module)
        spec.loader.exec_module = exec_module
        return spec

for _name in _TABLES:
    if _name in _sys.modules: _complete(_sys.modules[_name])
if _Finder not in _sys.meta_path: _sys.meta_path.insert(0, _Finder)
